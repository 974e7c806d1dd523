"""All experts' feed-forward networks in one operator."""
