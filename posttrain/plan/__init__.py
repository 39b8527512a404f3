"""A config's programs compiled for machines that are not there, and what that tells of them."""
