"""Methods that mend what another method damaged."""
