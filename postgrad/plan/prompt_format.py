"""Prompt formats of tasks: plain text or a chat template, with demonstrations before the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from postgrad.data.read.examples import Example
from postgrad.data.render.chat import ChatRenderer
from postgrad.data.render.demonstrations import SEPARATOR
from postgrad.data.render.renderers import PlainRenderer


class PromptFormat(Protocol):
    """Renders a question with its demonstrations, and an answer."""

    def question(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        """The text before the answer."""
        ...

    def answer(self, example: Example) -> str:
        """The answer of the row."""
        ...


@dataclass(frozen=True)
class PlainPromptFormat:
    """A prompt and an answer for each demonstration, an empty line between two.

    `separate`: the answer goes to a decoder of its own, so no separator follows the question.
    """

    renderer: PlainRenderer
    separate: bool

    def question(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        shots = "".join("".join(self.renderer.render_turn(shot)) + SEPARATOR for shot in demonstrations)
        prompt, separator, _ = self.renderer.render_turn(example)
        return shots + prompt + ("" if self.separate else separator)

    def answer(self, example: Example) -> str:
        return self.renderer.render_turn(example)[2]


@dataclass(frozen=True)
class ChatPromptFormat:
    """A conversation in the model's chat template, in which each demonstration is an earlier turn."""

    renderer: ChatRenderer

    def question(self, example: Example, demonstrations: Sequence[Example] = ()) -> str:
        *messages, _ = self._messages(example)
        num_system = int(messages[0]["role"] == "system")
        shots = [message for shot in demonstrations for message in self._messages(shot) if message["role"] != "system"]
        return self.renderer.render_text(
            [*messages[:num_system], *shots, *messages[num_system:]],
            example.fields.get("tools"),
            add_generation_prompt=True,
        )

    def answer(self, example: Example) -> str:
        return str(self._messages(example)[-1]["content"])

    def _messages(self, example: Example) -> Sequence[Mapping[str, Any]]:
        if "messages" in example.fields:
            return example.messages
        prompt, _, answer = self.renderer.turn_renderer.render_turn(example)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
