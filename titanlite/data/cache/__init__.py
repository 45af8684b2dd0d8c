"""The token cache: a source tokenised once, in shards (files) that any number of jobs share."""
