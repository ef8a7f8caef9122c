"""Online checks: a Ray Serve application, a page for people, and the reverse proxy in front."""
