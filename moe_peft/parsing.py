"""Configuration files laid over each other: a list in a later file replaces the one before."""

from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace


class ConfigParser(ArgumentParser):
    """jsonargparse's parser, but for lists.

    It merges two lists of equal length entry by entry: a task would inherit the row limits of the one that stood in its
    place in an earlier file, without a word.
    """

    def _load_config_parser_mode(
        self, content: str, path: Any = "", ext_vars: dict | None = None, prev_cfg: Namespace | None = None
    ) -> Namespace:
        try:
            given = yaml.safe_load(content)
        except yaml.YAMLError:
            given = None  # told of below
        if prev_cfg is not None:
            prev_cfg = without_lists(prev_cfg.clone(), given)
        return super()._load_config_parser_mode(content, path, ext_vars, prev_cfg)


def without_lists(before: Namespace, given: Any) -> Namespace:
    """Takes out of a configuration every list that a later file gives anew; changes and returns it."""
    for name, value in given.items() if isinstance(given, dict) else ():
        own = before.get(name)
        if isinstance(value, list) and isinstance(own, list):
            del before[name]
        elif isinstance(own, Namespace):
            without_lists(own, value)
    return before
