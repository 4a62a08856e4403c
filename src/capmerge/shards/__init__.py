"""A rewrite of many shards: files of a folder or behind a URL, by tasks that can be run again."""
