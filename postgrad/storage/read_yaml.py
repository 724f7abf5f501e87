"""YAML of limited size, without surprises: stage files, study files, lists of tasks and data cards."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_NUMBER_CHARACTERS = 2**20, 20_000, 50, 100
"""Limits of a YAML file: its size; its values, where each alias counts as all that it stands for; levels of nesting; the
length of a number, date or other value that is no text."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without surprises: a key that is a duplicate is an error, where YAML would let the last one win.

    `on` and `off` are words, as they are in YAML 1.2, and a key is never a truth value. Nodes, nesting and aliases are limited.
    """

    def __init__(self, text: str, max_nodes: int) -> None:
        super().__init__(text)
        self._max_nodes = max_nodes
        self._count, self._depth, self._sizes = 0, 0, dict[int, int]()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event, start = self.peek_event(), self._count
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _limit_error(f"it is nested more than {MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _limit_error(f"the alias *{event.anchor} is part of what it stands for", event)
            self._count += self._sizes[id(node)]
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - start
        if self._count > self._max_nodes:
            raise _limit_error(f"it has more than {self._max_nodes:,} values, aliases written out", event)
        if (
            isinstance(node, yaml.ScalarNode)
            and not node.tag.endswith(":str")
            and len(node.value) > MAX_NUMBER_CHARACTERS
        ):
            raise _limit_error(f"a value of {len(node.value):,} characters that is no text", event)
        return node

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if first not in "oO" or tag != "tag:yaml.org,2002:bool"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, whose keys may be overridden
                continue
            if key_node.tag == "tag:yaml.org,2002:bool":
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # an error of YAML's own
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is a duplicate", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _limit_error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def read_yaml(text: str, max_nodes: int | None = None) -> Any:
    """The value of a text in YAML. Raises `yaml.YAMLError` and, for what looks like a date and is none, `ValueError`."""
    return _StrictLoader(text, max_nodes or MAX_NODES).get_single_data()
