"""What is kept of a run while it trains: metrics, samples, router health, cost; dashboards."""
