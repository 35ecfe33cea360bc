"""Keeps what is known of each request beyond lm-evaluation-harness's result: the error of a likelihood, the cost of an answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from jaxblock.harness.bounds import Bound
from jaxblock.harness.generation import Generated

Question = tuple[str, int]
"""A task's name and the number of a document: the requests of one question have the same."""


def question_of(request: Instance, number: int) -> Question:
    """Returns the question of a request, the ``number``-th of its list; one that names no document is a question of its own."""
    return (request.task_name or "", number if request.doc_id is None else request.doc_id)


def place_of(request: Instance, number: int) -> str:
    """Returns a request's place for error messages."""
    task, document = question_of(request, number)
    return f"task {task}, document {document}" if task else f"request {number}"


class Details:
    """Keeps plain values about requests, by question."""

    def __init__(self) -> None:
        """Begins with no values about any request."""
        self._by_question: defaultdict[Question, dict[tuple[str, int, int], dict[str, Any]]] = defaultdict(dict)

    def of(self, question: Question) -> list[dict[str, Any]]:
        """Returns the values of a question's requests, in the order of the requests."""
        found = self._by_question.get(question, {})
        return [
            {"request": kind, "index": index, **values} for (kind, index, _), values in sorted(found.items(), key=_key)
        ]

    def keep_answer(self, request: Instance, number: int, answer: Generated, repeat: int) -> None:
        """Keeps what the ``repeat``-th answer to a request took."""
        values = {"tokens": answer.tokens, "nfe": answer.nfe, "ended": answer.ended}
        self._keep(request, number, values, repeat)

    def keep_bound(self, request: Instance, number: int, bound: Bound) -> None:
        """Keeps the estimate of a request's likelihood."""
        self._keep(request, number, _about(bound))

    def keep_choices(
        self, requests: Sequence[Instance], bounds: Sequence[Bound], greedy: Sequence[bool | None]
    ) -> None:
        """Keeps the estimates of requests, and by how much each is above the likeliest of its question, with the error of that.

        Some metrics (``acc_mutual_info``) also ask for the choices without their context: these are compared with nothing.
        """
        questions: defaultdict[Question, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            questions[question_of(request, number)].append(number)
        for numbers in questions.values():
            choices = [number for number in numbers if requests[number].args[0]] or numbers
            best = min((bounds[number] for number in choices), key=lambda bound: bound.nelbo)
            for number in numbers:
                values = _about(bounds[number]) | {"is_greedy": greedy[number]}
                if len(choices) > 1 and number in choices:
                    values["above_best"] = bounds[number].nelbo - best.nelbo
                    values["above_best_standard_error"] = bounds[number].error_of_difference(best)
                self._keep(requests[number], number, values)

    def _keep(self, request: Instance, number: int, values: dict[str, Any], repeat: int = 0) -> None:
        self._by_question[question_of(request, number)][request.request_type, request.idx, repeat] = values


def _key(item: tuple[tuple[str, int, int], dict[str, Any]]) -> tuple[str, int, int]:
    return item[0]


def _about(bound: Bound) -> dict[str, Any]:
    """Returns a bound as plain values, in nats."""
    exact = all(bound.exact)
    return {"nelbo": bound.nelbo, "standard_error": bound.standard_error, "exact": exact, "tokens": bound.tokens}
