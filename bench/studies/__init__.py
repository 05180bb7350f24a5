"""Questions answered without a device: simulations, a comparison of routers, pictures of parameter files."""
