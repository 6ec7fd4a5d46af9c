"""What `hf-d2sd doctor` found: one entry a check, in words."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    check: str
    level: str  # fine, note: nothing to do but to know it, or wrong
    words: str
    advice: str = ""  # what to do

    def report(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value}


def fine(check: str, words: str) -> Finding:
    return Finding(check, "fine", words)


def note(check: str, words: str, advice: str = "") -> Finding:
    return Finding(check, "note", words, advice)


def wrong(check: str, words: str, advice: str) -> Finding:
    return Finding(check, "wrong", words, advice)
