"""An interactive session with one or more models, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from postgrad.commands.generate import SamplingOptions, load_text_models
from postgrad.errors import ModelError, StageError


def run_chat(models: Sequence[str], options: SamplingOptions, *, chat: bool = True, base: str | None = None) -> None:
    """Read prompts until an empty line or Ctrl-D.

    A model with a chat template answers with the whole conversation as context; any other, or each with `chat=False`, continues
    the prompt alone. The oldest turns are dropped when they no longer fit.
    """
    if not sys.stdin.isatty():
        raise StageError("an interactive session needs a terminal", where="generate", hint="give a --prompt")
    text_models = load_text_models(models, base)
    histories: dict[int, list[dict[str, str]]] = {
        i: [] for i, text_model in enumerate(text_models) if chat and text_model.has_chat_template
    }
    print("Say something; an empty line ends." if histories else "Type a prompt; an empty line ends.")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not prompt.strip():
            break
        for i, text_model in enumerate(text_models):
            label = f"[{text_model.name}] " if len(text_models) > 1 else ""
            try:
                if i in histories:
                    print(f"{label}{text_model.answer(histories[i], prompt, options)}\n")
                else:
                    before = prompt * text_model.continues_prompt
                    print(f"{label}{before}{text_model.continue_text(prompt, options)}\n")
            except ModelError as error:  # too long a prompt; the next one may be shorter
                print(f"error: {error}\n")
                del histories.get(i, [])[-1:]
