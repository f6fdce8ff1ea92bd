"""The wire over HTTP: service, page, load test."""
