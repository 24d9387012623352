"""Leaves out of the collection what needs packages that the tests do not install."""

collect_ignore = ["spam_optax/integrations/levanter.py", "tests/trainer_pages"]
