"""From a URL to a local file: names, downloads, retries, and the copies of a machine in a cache of bounded size."""
