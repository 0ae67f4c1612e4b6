"""All rules, by name. rule.py says what a rule is."""

from . import adaptive, momentum, schedule_free, two_walks

RULES = {**adaptive.RULES, **momentum.RULES, **schedule_free.RULES, **two_walks.RULES}
