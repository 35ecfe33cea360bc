"""Defines ``HarnessModel``, a ``Model`` as lm-evaluation-harness expects one: it answers, and scores texts.

It works with ``lm_eval.simple_evaluate(model=HarnessModel(model), ...)`` as with ``jaxblock harness``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from jaxblock.data.text.examples import Message
from jaxblock.harness import bounds, gen_kwargs, generation, scoring
from jaxblock.harness.bounds import Bound, Continuation
from jaxblock.harness.details import Details, Question, place_of, question_of
from jaxblock.harness.gen_kwargs import Generation
from jaxblock.harness.generation import Prompt
from jaxblock.harness.texts import Texts
from jaxblock.model import Model


class HarnessModel(LM):
    """Answers the requests of lm-evaluation-harness with a model.

    A likelihood is the negative of an upper bound (NELBO) on the negative log-likelihood, estimated with random masks; the
    requests of one question share them. ``details`` has the estimates' errors.

    Attributes:
        model: the model.
        details: what is known of each request beyond lm-eval's result.
    """

    def __init__(
        self,
        model: Model,
        *,
        nelbo_samples: int | None = None,
        add_bos_token: bool | None = None,
        not_greedy: Collection[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepares to answer requests.

        Args:
            model: the model, which has a tokenizer. Its canvas and its `decode` settings say how it answers.
            nelbo_samples: the masked sets drawn per block of a text to be scored, at least 2; None for one for each position of a
                block. A block that has no more sets than this is computed exactly.
            add_bos_token: whether texts outside a chat template begin with the beginning-of-sequence token; None for what the
                tokenizer's settings say.
            not_greedy: the tasks for which it is not computed whether a text is the greedy answer; ``is_greedy`` is False there.
            say: called with lines about the progress.

        Raises:
            UserError: there is no tokenizer or no mask token, or there would be only one sample.
        """
        super().__init__()
        bounds.check_samples(nelbo_samples)
        self.model = model
        self.details = Details()
        self._texts = Texts(model, add_bos_token)
        self._samples, self._not_greedy, self._say = nelbo_samples, frozenset(not_greedy), say

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns an answer to each request. A repeated request gets another random key each time."""
        prompts, repeats, times = [], [], Counter[int]()
        how: dict[str, Generation] = {}
        for number, request in enumerate(requests):
            context, kwargs = request.args[:2]
            where, key = place_of(request, number), f"{request.task_name}: {sorted(kwargs.items(), key=repr)!r}"
            if key not in how:
                how[key] = self._how(kwargs, f"task {request.task_name}")
            repeats.append(times[id(request)])
            times[id(request)] += 1
            random_number = question_of(request, number)[1] * (request.repeats or 1) + repeats[-1]
            prompts.append(Prompt(self._texts.prompt(context, where), random_number, how[key]))
        answers = generation.generate_all(self.model, prompts, self._progress("answered {:,} of {:,} requests"))
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            self.details.keep_answer(request, number, answer, repeats[number])
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def _how(self, kwargs: dict[str, Any], where: str) -> Generation:
        """Returns how requests with these arguments are answered; says where they replace the user's temperature."""
        found, own = gen_kwargs.read_gen_kwargs(kwargs, self.model, where), self.model.options().temperature
        if own not in (0, found.options.temperature):
            self._say(
                f"note: {where} is decoded at temperature {found.options.temperature:g}, as its generation_kwargs say, not at "
                f"decode.temperature {own:g}; --gen_kwargs replaces them"
            )
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns minus the NELBO of each request's text given its context, and whether the text begins the greedy answer."""
        contexts: defaultdict[tuple[Question, str], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            contexts[question_of(request, number), request.args[0]].append(number)
        texts: list[Continuation | None] = [None] * len(requests)
        for ((_, document), context), numbers in contexts.items():
            choices = [requests[number].args[1] for number in numbers]
            where = place_of(requests[numbers[0]], numbers[0])
            prompt, responses = self._texts.prompt_and_choices(context, choices, where)
            for number, response in zip(numbers, responses, strict=True):
                texts[number] = Continuation(prompt, response, document)
        whole = [text for text in texts if text is not None]
        found = self._bound_all(whole)
        greedy = self._are_greedy(requests, whole)
        self.details.keep_choices(requests, found, greedy)
        results = [(-bound.nelbo, bool(is_greedy)) for bound, is_greedy in zip(found, greedy, strict=True)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def _are_greedy(self, requests: Sequence[Instance], texts: Sequence[Continuation]) -> list[bool | None]:
        """Tells whether each text begins the greedy answer to its prompt; None for the tasks that do not ask.

        Every prompt is decoded once, by the model's own decoder at temperature 0, as far as its longest text goes.
        """
        found: list[bool | None] = [None] * len(requests)
        by_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (request, text) in enumerate(zip(requests, texts, strict=True)):
            if request.task_name not in self._not_greedy:
                by_prompt[tuple(text.prompt)].append(number)
        if not by_prompt:
            return found
        options = gen_kwargs.greedy(self.model.options())
        prompts = [
            Prompt(
                ids, texts[numbers[0]].question, Generation((), max(len(texts[n].response) for n in numbers), options)
            )
            for ids, numbers in by_prompt.items()
        ]
        self._say(f"decoding {len(prompts):,} prompts, to tell whether the texts are the greedy answers")
        for numbers, answer in zip(by_prompt.values(), generation.first_tokens(self.model, prompts), strict=True):
            for number in numbers:
                found[number] = answer[: len(texts[number].response)] == list(texts[number].response)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns minus the NELBO of each whole text: R tokens at a time, each time after as many before them as a prompt may have."""
        model, layout = self.model, self.model.layout(self.model.options())
        longest = min(model.canvas.prompt_len, model.arch.max_len - layout.response_len)
        parts: list[Continuation] = []
        ends = [0]
        for number, request in enumerate(requests):
            ids = self._texts.text(request.args[0], place_of(request, number))
            parts += bounds.windows(ids, self._texts.prefix, layout, longest, question_of(request, number)[1])
            ends.append(len(parts))
        found = self._bound_all(parts)
        results = []
        for number, request in enumerate(requests):
            bound = bounds.sum_bounds(found[ends[number] : ends[number + 1]])
            self.details.keep_bound(request, number, bound)
            results.append(-bound.nelbo)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _bound_all(self, texts: Sequence[Continuation]) -> list[Bound]:
        return scoring.bound_all(self.model, texts, self._samples, self._progress("scored {:,} of {:,} masked sets"))

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Returns a conversation in the model's own chat template; see ``Texts.render``."""
        return self._texts.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer and its chat template, for lm-eval's caches of requests."""
        return str(self.model.origin)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the model's chat template; None where it has none."""
        return self.model.encoder.template.source if self.model.encoder else None

    def get_model_info(self) -> dict[str, Any]:
        """Returns what lm-eval's results say of the model."""
        canvas, options = dataclasses.asdict(self.model.canvas), dataclasses.asdict(self.model.options())
        return {"checkpoint": self.model.origin, "canvas": canvas, "decode": options, "nelbo_samples": self._samples}

    def _progress(self, line: str) -> Callable[[int, int], None]:
        """Returns a function that says how much is done, at each tenth."""
        told = 0

        def tell(done: int, of: int) -> None:
            nonlocal told
            if done * 10 // of > told:
                told = done * 10 // of
                self._say(line.format(done, of))

        return tell
