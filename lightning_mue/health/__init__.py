"""Is a run healthy? Indicators and their bands, the verdict on a run's metrics, and the page that shows both."""
