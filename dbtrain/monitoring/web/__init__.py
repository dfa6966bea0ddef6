"""The web page of a run: `server.serve` answers a browser, and only reads the run directory."""
