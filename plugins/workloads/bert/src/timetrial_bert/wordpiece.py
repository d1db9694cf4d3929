"""WordPiece vocabularies (Schuster and Nakajima 2012; Devlin et al., section 3) with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from core.api.errors import DataError

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUED = "##"
"""Stands before a token that continues a word."""


STARTER = Path(__file__).parent / "assets" / "vocab.txt"
"""Of the starter checkpoint, and so of the embedded data set; `python -m timetrial_bert.starter` makes both."""


class WordPiece:
    """Text to token numbers, as BERT's uncased or cased models do it. `tokens[i]` is the token with number i."""

    def __init__(self, tokens: Sequence[str], lower_case: bool) -> None:
        self.tokens = list(tokens)
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        self.pad, self.unknown, self.cls, self.sep, self.mask = (vocabulary[token] for token in SPECIAL)
        self._tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=200))
        _prepare(self._tokenizer, lower_case)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token numbers of each text, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def load(path: Path, lower_case: bool) -> WordPiece:
    """A vocabulary file as published with BERT: one token a line. DataError where it lacks a special token."""
    try:
        tokens = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the vocabulary {path}: {error}") from None
    missing = [token for token in SPECIAL if token not in tokens]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: give BERT's vocab.txt, one token a line")
    return WordPiece(tokens, lower_case)


def train(texts: Sequence[str], size: int, lower_case: bool) -> list[str]:
    """The `size` tokens of a vocabulary made from the texts; the same texts in the same order give the same tokens.

    The library numbers the letters inside words in the order of a hash table, which changes from call to call, and
    breaks ties by these numbers. Here they are numbered beforehand.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    _prepare(tokenizer, lower_case)
    inner = {letter for text in texts for word in _words(tokenizer, text) for letter in word[1:]}
    numbered = [*SPECIAL, *sorted(CONTINUED + letter for letter in inner)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=numbered, show_progress=False)
    tokenizer.train_from_iterator(_batched(texts), trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _words(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    normal = tokenizer.normalizer.normalize_str(text)
    return (word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))


def _prepare(tokenizer: Tokenizer, lower_case: bool) -> None:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()


def _batched(texts: Iterable[str], size: int = 1000) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch
