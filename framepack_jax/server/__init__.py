"""An HTTP server: one loaded bundle and a durable queue of videos."""
