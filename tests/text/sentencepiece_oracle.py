"""The sentencepiece library itself over a GGUF's vocabulary: what SPM tokenising truly is."""

from __future__ import annotations

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pipeserve.gguf.reader import GGUFFile


def processor(gguf_file: GGUFFile) -> sentencepiece.SentencePieceProcessor:
    """A processor with the file's pieces, scores, types and space prefix."""
    model = sentencepiece_model_pb2.ModelProto()
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.byte_fallback = True
    spec.unk_id = gguf_file.metadata_int("tokenizer.ggml.unknown_token_id")
    spec.bos_id, spec.eos_id, spec.pad_id = -1, -1, -1
    normaliser = model.normalizer_spec
    normaliser.name = "identity"
    normaliser.add_dummy_prefix = gguf_file.metadata_bool("tokenizer.ggml.add_space_prefix", True)
    normaliser.remove_extra_whitespaces = False
    normaliser.escape_whitespaces = True
    types = gguf_file.metadata_array("tokenizer.ggml.token_type").tolist()
    scores = gguf_file.metadata_array("tokenizer.ggml.scores").tolist()
    tokens = gguf_file.metadata_strings("tokenizer.ggml.tokens")
    for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        # GGUF writes the spaces of user-defined pieces as they are, SentencePiece never does.
        piece = model.pieces.add(piece=token.replace(" ", "▁"), score=score)
        piece.type = piece.Type.UNKNOWN if index == spec.unk_id else kind
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
