"""The verb ``chat``: a conversation with the model of a run, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from train.cli.generate import choose_settings
from train.config.schema import GenerationConfig
from train.data.chat.conversations import Message
from train.data.chat.sandbox import TemplateError
from train.data.chat.template import ChatTemplate, TemplateSource
from train.errors import UserError
from train.generation.prompts import require_room
from train.generation.sample_loop import generate
from train.generation.text_streamer import TextStreamer
from train.models.generation_api import Generative
from train.printable import printable
from train.run_dir.open_run import open_run
from train.util.run_layout import RunDir

HELP = "/reset forgets what was said, /quit or Ctrl-D ends"
Write = Callable[[str], None]


class Chat:
    """A conversation: what was said so far, and the model that answers."""

    def __init__(self, model: Generative, template: ChatTemplate, settings: GenerationConfig, system: str = "") -> None:
        """``system``: an instruction that stands before all turns, if given."""
        self.model, self.template, self.settings = model, template, settings
        self.system: list[Message] = [{"role": "system", "content": system, "train": False}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget all turns, but not the instruction."""
        self.messages = list(self.system)

    def answer(self, question: str, write: Write = lambda piece: None) -> str:
        """The model's next turn, which ``write`` is called with as it is drawn, and kept with the question.

        It ends at the template's end of turn, or as other texts do. Raises UserError where the conversation is longer
        than the model's longest sequence, or the template refuses it; the question is dropped then.
        """
        asked = [*self.messages, {"role": "user", "content": question, "train": False}]
        try:
            prompt = self.template.encode_prompt(asked)
        except TemplateError as error:
            raise UserError(f"the chat template {self.template.source.name} {error}") from None
        require_room(0, len(prompt), self.model.max_len)
        streamer = TextStreamer(self.template.tokenizer, prompt, self.settings.stop)

        def on_token(row: int, token: int) -> bool:
            write(streamer.add(token))
            return streamer.stopped

        generate(self.model, [prompt], self.settings, self.template.end_of_turn, on_token)
        write(streamer.end())
        self.messages = [*asked, {"role": "assistant", "content": streamer.text, "train": True}]
        return streamer.text


def run(options: Mapping[str, str]) -> None:
    """Talk with the model of a run: a line of input is a turn. Raises UserError."""
    folder = Path(options["run.dir"])
    saved = open_run(folder, options["checkpoint"])
    file = RunDir(folder).chat_template
    if not file.exists():
        raise UserError(f"{folder} was not trained on conversations (data=chat): generate continues its texts")
    model = saved.objective.to("cuda" if torch.cuda.is_available() else "cpu")
    template = ChatTemplate(TemplateSource.read(file), saved.tokenizer)
    settings = choose_settings(saved.config.generation, options).model_copy(update={"n": 1, "beams": 1})
    chat = Chat(model, template, settings, options["system"])
    live = sys.stdin.isatty()
    if live:
        sys.stdout.write(f"{folder}, step {saved.checkpoint.progress.step}. {HELP}\n")
    for line in _lines("> " if live else ""):
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            continue
        if line.strip():
            try:
                chat.answer(line, _write)
            except UserError as error:
                if not live:
                    raise
                _write(f"{error}")
            _write("\n")


def _lines(prompt: str) -> Iterator[str]:
    while True:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\r\n")


def _write(text: str) -> None:
    """Writes the very text, but to a terminal no characters that it would obey: a model may write any."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
