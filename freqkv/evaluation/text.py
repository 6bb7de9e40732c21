"""How many bytes of text a token stands for, so that models with other tokenizers can be compared."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["byte_lengths"]


def byte_lengths(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> LongTensor:
    """Count the UTF-8 bytes that each token stands for.

    Special tokens stand for no text and count 0 bytes. A character may span several tokens; each of them then
    counts its own bytes.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        A byte-level BPE tokenizer, or one of the SentencePiece kind with byte fallback.
    input_ids : Tensor, shape (T,) or (batch, T), integer
        Token ids.

    Returns
    -------
    LongTensor, shape of `input_ids`, on its device
        Bytes per token.

    Raises
    ------
    ValueError
        If `input_ids` has another number of dimensions, or if the tokens' bytes are not the text that the tokenizer
        decodes, so that the counts would be wrong.
    """
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must have shape (T,) or (batch, T), got {tuple(input_ids.shape)}")
    if not input_ids.numel():
        return torch.zeros_like(input_ids, dtype=torch.int64)  # type: ignore[return-value]
    rows = [_row_byte_lengths(tokenizer, row.tolist()) for row in input_ids.reshape(-1, input_ids.shape[-1])]
    lengths = torch.tensor(rows, dtype=torch.int64, device=input_ids.device).reshape(input_ids.shape)
    return lengths  # type: ignore[return-value]


def _row_byte_lengths(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    expected = _without_replacements(text)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab().values())
    for token_bytes in (_byte_level_bytes, _sentencepiece_bytes):
        try:
            pieces = [
                b"" if index in special else token.encode() if index in added else token_bytes(token)
                for index, token in zip(ids, tokens, strict=True)
            ]
        except KeyError:
            continue
        lengths = [len(piece) for piece in pieces]
        joined = _without_replacements(b"".join(pieces).decode(errors="replace"))
        if joined == expected:
            return lengths
        if joined == " " + expected:
            # SentencePiece puts a space in front of a text and takes it off again when it decodes.
            first = next(i for i, length in enumerate(lengths) if length)
            lengths[first] -= 1
            return lengths
    raise ValueError("the bytes of the tokens do not add up to the text that the tokenizer decodes")


def _without_replacements(text: str) -> str:
    # A text cut inside a character decodes to replacement marks, whose number is up to the decoder.
    return text.replace("\ufffd", "")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, as GPT-2 defined it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_LEVEL[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
