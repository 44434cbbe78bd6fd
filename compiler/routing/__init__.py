"""Routing: routers, profiles of their routes, and what watches live ones."""
