"""Kernel templates: each lowers one kind of group and lists the configurations worth trying."""
