"""Methods that make given codes better together: `(window, codes, *, options) -> codes`."""
