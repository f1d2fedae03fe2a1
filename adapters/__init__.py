"""What an adapter is: as files, as versions in a registry, merged into its base. Knows nothing of HTTP or vLLM."""
