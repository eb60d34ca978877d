"""Methods that store a weight as products of smaller matrices."""
