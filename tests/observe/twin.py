"""The slow, obvious twin of the mirror: plain sets of paths, every page named by all the pages before it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

Path = tuple[object, ...]


def prefixes(path: Path) -> list[Path]:
    return [path[:length] for length in range(1, len(path) + 1)]


@dataclass
class Record:
    """What has happened to a page since it was stored."""

    requests: int = 0
    hits: int = 0
    ends_prompt: bool = False


@dataclass
class Twin:
    """Pages stored, by path; running requests: where they leave the tree, and their own tokens."""

    page_tokens: int
    pages: dict[Path, Record] = field(default_factory=dict)
    running: list[tuple[Path, int]] = field(default_factory=list)

    def stored(self, path: Path) -> None:
        for page in prefixes(path):
            self.pages.setdefault(page, Record())

    def ended(self, path: Path, hit_tokens: int, prompt_tokens: int) -> None:
        """path: of its whole pages."""
        for page in prefixes(path):
            self.pages[page].requests += 1
            self.pages[page].hits += len(page) * self.page_tokens <= hit_tokens
        last = (prompt_tokens - 1) // self.page_tokens + 1
        if last <= len(path):
            self.pages[path[:last]].ends_prompt = True

    def contexts(self) -> list[tuple[Path, int]]:
        """Running ones, and the leaves that none of them continues."""
        inner = {path[:-1] for path in self.pages} | {path for path, _ in self.running}
        return [*self.running, *((path, 0) for path in self.pages if path not in inner)]

    def conversations(self) -> list[list[tuple[Path, int]]]:
        """Contexts by the first prompt that ended in their path; those without one are alone."""
        together: dict[object, list[tuple[Path, int]]] = defaultdict(list)
        for number, (path, own_tokens) in enumerate(self.contexts()):
            first = next((page for page in prefixes(path) if self.pages[page].ends_prompt), None)
            together[number if first is None else first].append((path, own_tokens))
        return list(together.values())

    def logical_tokens(self) -> int:
        return sum(len(path) * self.page_tokens + own_tokens for path, own_tokens in self.contexts())

    def conversation_tokens(self) -> int:
        return sum(map(self.tokens_as_a_tree, self.conversations()))

    def stored_tokens(self) -> int:
        return len(self.pages) * self.page_tokens + sum(own_tokens for _, own_tokens in self.running)

    def shared_tokens(self) -> int:
        return sum(record.requests >= 2 for record in self.pages.values()) * self.page_tokens

    def tokens_as_a_tree(self, contexts: list[tuple[Path, int]]) -> int:
        pages = {page for path, _ in contexts for page in prefixes(path)}
        return len(pages) * self.page_tokens + sum(own_tokens for _, own_tokens in contexts)

    def node(self, path: Path, begin: int) -> dict[str, int]:
        """Of the pages `begin` to the last one of path: what NodeStats says of them."""

        def through(contexts: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
            return [context for context in contexts if context[0][: len(path)] == path]

        records = [self.pages[page] for page in prefixes(path)[begin:]]
        return {
            "start_tokens": begin * self.page_tokens,
            "tokens": len(records) * self.page_tokens,
            "contexts": len(through(self.contexts())),
            "conversations": sum(bool(through(group)) for group in self.conversations()),
            "running": len(through(self.running)),
            "requests": records[0].requests,
            "hits": records[0].hits,
            "hit_tokens": sum(record.hits for record in records) * self.page_tokens,
            "subtree_tokens": sum(page[: begin + 1] == path[: begin + 1] for page in self.pages) * self.page_tokens,
        }
