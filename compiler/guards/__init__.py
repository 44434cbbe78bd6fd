"""Guards: what must not have changed since a program was made, asked quickly."""
