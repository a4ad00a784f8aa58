"""The built-in demo: two-digit addition, learned from a teacher who forgets to carry."""
