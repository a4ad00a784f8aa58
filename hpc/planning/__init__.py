"""From a request to a batch script: pure functions that read only what they are given."""
