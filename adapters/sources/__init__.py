"""Where adapters lie before they are versions: a folder, a bucket, the Hub. Files come from here, checks do not."""

HUB_ENDPOINT = "https://huggingface.co"
