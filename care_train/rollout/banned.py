"""Which tokens no engine may sample."""

from care_train.models.load import LoadedModel


def banned_token_ids(loaded: LoadedModel) -> list[int]:
    """Image, vision and other special tokens but EOS, and the head's padding.

    A sampled image token has no image, and the next forward would not survive it.
    """
    eos = set(loaded.eos_token_ids)
    special = loaded.tokenizer.added_tokens_decoder.items()
    banned = [i for i, token in special if token.special and i not in eos]
    # Ids above the tokenizer's are the head's padding, not tokens.
    num_ids = loaded.model.get_output_embeddings().out_features
    return banned + list(range(len(loaded.tokenizer), num_ids))
