"""Who trains what where: a coordinator without Ray in it, and two backends, Ray actors and this process."""
