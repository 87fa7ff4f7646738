"""A device: runs a model here, in the cloud, or here and there, one token after the other."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from isthmus.edge import priors, profile
from isthmus.edge.answer import Answer, OnRollback
from isthmus.edge.chat import Chat, Message, parse
from isthmus.edge.controller import Controller
from isthmus.edge.conversation import Conversation
from isthmus.edge.drafting import NGRAMS, Drafting, files_for
from isthmus.edge.events import Timeouts
from isthmus.edge.exits import Exits
from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.holding import Holding
from isthmus.edge.journal import Journal
from isthmus.edge.knowledge import Knowledge
from isthmus.edge.link import Link, Wire
from isthmus.edge.modes import Modes
from isthmus.edge.notes import Notes
from isthmus.edge.opening import Opening
from isthmus.edge.options import (
    GenerateOptions,
    Overflow,
    alone_refused,
    as_mode,
    as_wish,
    check_cut,
    check_device,
    check_memory,
    kv_room,
    stop_words,
)
from isthmus.edge.resumed import Resumed
from isthmus.edge.standby import Standby
from isthmus.edge.steering import Steering
from isthmus.edge.text import Text, token_ids
from isthmus.edge.token import CutOff, Mode, Source, Stats, Token
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol.address import is_local
from isthmus.protocol.errors import DeviceError
from isthmus.split.bundle import Bundle

if TYPE_CHECKING:
    from isthmus.protocol.keys import DeviceKeys

Prompt = str | Sequence[int] | None


class Device:
    """A language model on a device, with or without a cloud; a context manager.

    Everything that was said in the conversation stands in one token log. Each side keeps the KV that it computed for
    it, so a conversation may go on in another mode at any token: only what the other side lacks is computed or sent.

    Args:
        bundle: a bundle's folder, or an open bundle. A folder that is not there yet is fetched from the cloud.
        cloud: the cloud's address, such as "tcp://host:5757".
        model: which of the cloud's models to fetch, by the beginning of its id or a name of its own; None for its only.
        keys: folder of this device's key and the cloud's public key, or the keys; None for the user's own folder.
        encrypted: off speaks in the clear, which is possible with a cloud on this machine only.
        mode: "auto" (the way that ends the answer first, see `prefer`), "local", "stream", "split", "verify" (drafted
            here and checked in the cloud: the cloud model's own text), or "exit" (an exit's word where it is sure).
        cut: layer before which hidden states leave the device in split mode; None for the middle.
        codec: how hidden states travel: "f32", "f16", "int8" or "ecsqN" (entropy-coded, coarser with a smaller N);
            empty for f16 in split, and in exit mode for what the exit was calibrated with, else ecsq6.
        threshold: confidence from which on exit mode believes the exit; None for what its certificate says.
        guesses: tokens that exit mode goes on for, unsure, before it asks, at most; 0 asks about each.
        draft: what verify mode drafts with: the conversation's "ngrams", the bundle's "exit", or the folder of a small
            model's bundle with the same tokenizer, which auto then weighs, too.
        draft_depth: blocks of drafts that may be under way at once; 1 waits for each answer.
        threads: threads of the engine, 0 for one per core.
        memory_mb: most memory that this process may need, in 10^6 bytes; None for no limit.
        experts: how the experts of a mixture are held; None for all of them in memory.
        kv_tokens: positions that a conversation may have; None for the model's context, at most 4,096.
        overflow: what a longer conversation does: "error", or "slide" (attention sees the last kv_tokens positions).
        backend: as in `isthmus.engine.open_part`.
        slow_down: pretends to be a machine so many times slower, by waiting in proportion to what it computes.
        prefer: what "auto" is after: "speed", "cloud-cost" (the fewest seconds of the cloud's engine that do not take
            much longer) or "privacy" (this device alone; no cloud is spoken to).
        max_disagreement: share of tokens that "auto" may let exits decide otherwise than the cloud's model, certified
            for greedy answers; 0 keeps to its very text. (Where exits speak, states travel rounded, which turns ties.)
        explain: called with why "auto" works as it does, when an answer begins and when that changes.
        fallback: whether this device goes on by itself when the cloud, having answered, goes away; in "auto" also if it
            refuses what it granted before or stays busy. It does so after two round trips of silence with tokens that
            count as guesses until the cloud, back again, confirms them.
        standby: whether a device that can go on by itself keeps itself ready for that while the cloud computes: the
            model open, and KV for the conversation. Off it gets ready once the cloud is silent. None for on, unless
            `cloud` is an address of this machine, whose memory's speed both would share.
        on_rollback: what becomes of guesses from the first wrong one on: "replace" takes them back, "keep" lets them
            stand; a function is given the `Rollback` before that and returns whether to replace.
        resume: a file in which the conversation is kept, and from which it is taken up again; None for none.
        timeouts: how patient the device is with the cloud.
        progress: called while a bundle is fetched, with a file's name, the bytes that are here, and its size.
        wire, clock: a connection to use in place of the one to `cloud`, and its seconds.

    Attributes:
        stats: what the last generation cost.

    Raises:
        DeviceError: the settings do not fit the bundle or the memory.
        LinkError: the cloud's address is none; or its host does not exist, and this device cannot do without it.
        BundleError: the bundle cannot be used.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        cloud: str | None = None,
        *,
        model: str | None = None,
        keys: str | Path | DeviceKeys | None = None,
        encrypted: bool = True,
        mode: str = "auto",
        cut: int | None = None,
        codec: str = "",
        threshold: float | None = None,
        guesses: int | None = None,
        draft: str | Path = NGRAMS,
        draft_depth: int = 8,
        threads: int = 0,
        memory_mb: float | None = None,
        experts: ExpertSettings | None = None,
        kv_tokens: int | None = None,
        overflow: Overflow = "error",
        backend: str = "auto",
        slow_down: float = 1.0,
        timeouts: Timeouts | None = None,
        prefer: str = "speed",
        max_disagreement: float = 0.0,
        explain: Callable[[str], None] | None = None,
        fallback: bool = True,
        standby: bool | None = None,
        on_rollback: OnRollback = "replace",
        resume: str | Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        wire: Wire | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        GenerateOptions(mode=as_mode(mode), codec=codec, threshold=threshold, guesses=guesses)
        check_device(overflow, on_rollback, threads, draft_depth)
        check_memory(memory_mb)
        self._wish = as_wish(prefer, max_disagreement, mode, experts is not None and experts.mode == "cloud")
        if self._wish.prefer == "privacy":
            cloud = wire = None
        self.stats = Stats()
        self._notes = Notes()
        self._notes.begin(self.stats)
        self._on_rollback = on_rollback
        self._closed = False
        self._mode: Mode = as_mode(mode)
        self._codec, self._threshold, self._guesses = codec, threshold, guesses
        with ExitStack() as opened:
            timeouts = timeouts or Timeouts()
            opening = Opening(cloud, timeouts, wire, clock, self._notes.waits)
            opened.callback(opening.close)
            opening.connect(keys, encrypted, self._mode)
            self._bundle = opening.bundle(bundle, files_for(self._mode, draft), cut, model or "", progress)
            self.config = self._bundle.config
            self._cut = check_cut(cut, self.config) if cut is not None else None
            room, slides = kv_room(kv_tokens, self.config), overflow == "slide"
            window = room if slides else 0
            watch = priors.watch(self._bundle, experts, threads, clock, opening.wire is not None)
            self._conversation = Conversation(room, slides, self.config.vocab_size)
            self._log = self._conversation.log
            self._holding = Holding(
                self._bundle,
                memory_mb=memory_mb,
                kv_tokens=room,
                window=window,
                backend=backend,
                threads=threads,
                slow_down=slow_down,
                experts=experts,
                watch=watch,
            )
            self._holding.check_cloud(opening.wire is not None)
            if self._wish.prefer == "privacy" and not self._holding.whole:
                raise alone_refused(self._holding.layers, self.config.n_layers)
            opened.callback(self._holding.close)
            self._exits = Exits(self._bundle, self._holding)
            opened.callback(self._exits.close)
            self._drafting = Drafting(self._bundle, draft, self._exits, self._holding, draft_depth, room, clock)
            opened.callback(self._drafting.close)
            if opening.absent is not None and not self._holding.whole:
                raise opening.absent
            computes = self._mode in ("local", "split") or opening.wire is None
            if computes:
                self._holding.prefetch()
            self._modes = Modes(
                self._bundle, self._holding, self._drafting, self._exits, self._log, opening.where, self._notes.add
            )
            self._link: Link | None = None
            self._active: Generator[Token] | None = None
            self._owner = threading.current_thread()  # of `_active`
            if opening.wire is not None:
                self._link = opening.link(self._bundle.model_id, self._log, window)
                self._conversation.keep(self._link.session.edited)
            for keeper in (self._holding, self._exits, self._drafting):
                self._conversation.keep(keeper.truncate)
            early = not (cloud and is_local(cloud)) if standby is None else standby
            goes_on = fallback and self._modes.can_bridge
            controller: Controller | None = None
            if self._link is not None:
                knowledge = Knowledge(
                    self._bundle,
                    self._holding,
                    self._link,
                    self._log,
                    watch,
                    small=self._drafting.small,
                    slides=slides,
                    settings=(backend, threads, slow_down, memory_mb, kv_tokens, experts),
                    tries=standby is not False,
                    kept=profile.folder(),
                    clock=clock,
                )
                self._conversation.keep(knowledge.truncate)
                controller = Controller(knowledge, self._modes, self._link, self._wish, clock, explain)
            self._steering = Steering(
                self._modes,
                self._holding,
                self._link,
                opening.absent,
                self._notes,
                fallback=fallback,
                standby=Standby(self._modes.alone, self._holding.prefetch, self._log, early) if goes_on else None,
                timeouts=timeouts,
                clock=clock,
                controller=controller,
                tell=explain,
            )
            self._journal: Journal | None = None
            self._resumed: Resumed | None = None
            self._tokenizer = self._bundle.tokenizer()
            self._eos = tuple(self._bundle.manifest.tokenizer.eos)
            self._chat = Chat(self._tokenizer, self._eos)
            if resume is not None:
                journal = Journal(resume, self._bundle.model_id, self._bundle.name)
                opened.callback(journal.close)
                self._restore(journal)
            if computes:
                self._holding.open(self.cut if self._mode == "split" and self._link else self.config.n_layers)
            opened.pop_all()

    # -- what people call

    @property
    def tokens(self) -> list[int]:
        """The conversation's token log, a copy."""
        return list(self._log.tokens)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat so far: a role and a content each, the last of them the model's answer."""
        return [one.to_dict() for one in self._chat.messages]

    @property
    def mode(self) -> Mode:
        """What `generate` and `chat` do unless told otherwise."""
        return self._mode

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return self._bundle.name

    @property
    def cut(self) -> int:
        """The layer before which hidden states leave the device in split mode."""
        return self._modes.default_cut() if self._cut is None else self._cut

    @property
    def expert_report(self) -> ExpertReport | None:
        """What experts cost so far; None where all of them are in memory, or this device had nothing to compute."""
        return ExpertReport.of(self._holding.store) if self._holding.store is not None else None

    @property
    def holds_whole_model(self) -> bool:
        """Whether this device can answer without a cloud."""
        return self._holding.whole

    def generate(
        self,
        prompt: Prompt = None,
        *,
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        mode: str | None = None,
        cut: int | None = None,
        codec: str | None = None,
    ) -> Iterator[Token]:
        """Goes on from a prompt, token by token.

        Args:
            prompt: a text (taken as it is, without the chat template), token ids, or None to go on where the
                conversation stands. What it has in common with the conversation so far is not computed again.
            max_tokens: tokens at most, the end-of-sequence token included.
            sampling: how tokens are chosen; the seed and a token's position fix it wherever it is computed.
            stop: words that end the text.
            mode, cut, codec: this time in place of the device's own.

        Raises:
            DeviceError: the prompt, the cut or the conversation's length does not fit.
            LinkError: the cloud does not answer, and this device cannot go on without it.
        """
        started = time.perf_counter()
        options = self._options(max_tokens, sampling, stop, mode, cut, codec)
        self._stop_active()
        if prompt is not None:
            self._conversation.replace(token_ids(prompt, self._tokenizer, self.config.vocab_size))
        elif not len(self._log):
            raise DeviceError("there is nothing to go on from", "give a prompt")
        return self._begin(options, started)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 512,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        mode: str | None = None,
        cut: int | None = None,
        codec: str | None = None,
    ) -> Iterator[Token]:
        """Answers in a conversation, through the model's chat template.

        Args:
            messages: what the user says next, or all messages ({"role": ..., "content": ...}); when those go on from
                the conversation so far, its KV is used again.

        Raises:
            DeviceError: as `generate`; or the model has no chat template.
        """
        started = time.perf_counter()
        options = self._options(max_tokens, sampling, stop, mode, cut, codec)
        self._stop_active()
        mine = [*self.messages, {"role": "user", "content": messages}] if isinstance(messages, str) else messages
        asked = parse(mine)
        self._conversation.replace(self._chat.prompt(asked, self._log.tokens))
        return self._begin(options, started, asked)

    @property
    def unfinished(self) -> CutOff | None:
        """The answer that was cut off in the file that was opened, to `go_on` with; None when there is none."""
        return self._resumed.unfinished(self._log.tokens) if self._resumed is not None else None

    @property
    def answered(self) -> Stats | None:
        """The chat's last answer in the file that was opened, where it is complete and nothing was said since.

        It has tokens, sources, text and how it ended; what it cost is not kept.
        """
        return self._resumed.answered(self._log.tokens) if self._resumed is not None else None

    def go_on(self) -> Iterator[Token]:
        """The rest of the answer that was cut off, as it was asked for then, in this device's mode.

        Its stats are those of the whole answer.

        Raises:
            DeviceError: there is none.
        """
        started = time.perf_counter()
        resumed = self._resumed
        if resumed is None or self.unfinished is None:
            raise DeviceError("there is no answer to go on with", "ask something")
        self._stop_active()
        asked_for = resumed.options()
        options = replace(asked_for, mode=self._mode)
        if self._mode != asked_for.mode:
            options = replace(options, cut=self._cut, codec=self._codec, threshold=self._threshold)
        answer = self._begin(options, started, resumed.asked(), resumed.said())
        self._resumed = None
        return answer

    def reset(self) -> None:
        """Forgets the conversation.

        Raises:
            DeviceError: the device is closed, or another thread is generating with it.
        """
        self._check_open()
        self._stop_active()
        self._chat.forget()
        self._conversation.cut(0)

    def close(self) -> None:
        """Ends the conversation here and in the cloud, and frees everything."""
        if self._closed:
            return
        self._stop_active()
        self._closed = True
        if self._link is not None:
            self._link.close(keep=self._journal is not None)
        if self._journal is not None:
            self._journal.close()
        self._drafting.close()
        self._exits.close()
        self._holding.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- generating

    def _options(
        self,
        max_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        mode: str | None,
        cut: int | None,
        codec: str | None,
    ) -> GenerateOptions:
        self._check_open()
        cut = self._cut if cut is None else check_cut(cut, self.config)
        chosen = self._mode if mode is None else as_mode(mode)
        as_wish(self._wish.prefer, self._wish.max_disagreement, chosen, self._wish.own)
        codec = codec or self._codec
        asked = (max_tokens, sampling, stop_words(stop), chosen)
        return GenerateOptions(*asked, cut, codec, self._threshold, self._guesses)

    def _begin(
        self,
        options: GenerateOptions,
        started: float,
        asked: list[Message] | None = None,
        said: Sequence[tuple[int, Source]] = (),
    ) -> Iterator[Token]:
        self._conversation.check(len(self._log))
        self.stats = Stats(prompt_tokens=len(self._log) - len(said))
        self._notes.begin(self.stats)

        journal = self._journal
        if journal is not None and not said:
            messages = None if asked is None else [one.to_dict() for one in asked]
            journal.began(len(self._log), options.to_dict(), messages)

        def ended(text: str) -> None:
            if asked is not None:
                self._chat.answered(asked, text, self._log.tokens)
            if journal is not None:
                unsure = self.stats.unverified if self._on_rollback != "keep" else 0
                journal.ended([one.to_dict() for one in self._chat.messages], self.stats.finish, unsure)

        def text() -> Text:
            return Text(self._tokenizer.stream(), options.stop)

        common = self._conversation, self._steering, self._notes
        answer = Answer(*common, options, text, self._eos, started, self._on_rollback, ended, said)
        self._owner = threading.current_thread()
        self._active = answer.tokens()
        return self._active

    def _restore(self, journal: Journal) -> None:
        """Takes up what a journal holds, and writes on there."""
        self._journal, self._resumed = journal, Resumed(journal.kept, self._tokenizer, self._eos)
        if not all(map(self._conversation.speaks, journal.kept.tokens)):
            raise DeviceError("the resume file holds tokens that this model has not", "name another file")
        self._conversation.check(len(journal.kept.tokens) - 1)  # the last token of a full one has no KV
        self._log.extend(journal.kept.tokens)
        self._conversation.journal = journal
        self._chat.restore(journal.kept.messages, journal.kept.tokens if journal.kept.told else ())
        if self._link is not None:
            self._link.session.restore, self._link.on_lane = journal.restore, journal.lane
            self._link.session.patience.known = any(source != "device" for source in journal.kept.sources)

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("the device is closed", "open another one")

    def _stop_active(self) -> None:
        if (active := self._active) is None:
            return
        state, owner = inspect.getgeneratorstate(active), self._owner
        if state != inspect.GEN_CLOSED and owner is not threading.current_thread() and owner.is_alive():
            raise DeviceError("another thread is generating with this device", "give each thread a Device of its own")
        if state == inspect.GEN_RUNNING:
            raise DeviceError("the device is in the middle of an answer", "let on_rollback return first")
        active.close()
        self._active = None
