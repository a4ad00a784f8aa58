"""What runs inside the job: starts every role, watches it, and decides what comes after it."""
