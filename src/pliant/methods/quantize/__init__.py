"""Methods that store each weight in fewer bits."""
