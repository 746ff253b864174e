"""Trains the byte-level BPE tokenizer of the demo model on a sample of the generated corpus.

python data/train_tokenizer.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from corpus import MAX_FACTS, TASKS, draw_topic
from layout import END_OF_TEXT, PADDING, TURN_END, TURN_START, draw_header, plain_document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).parent / "demo_model"
VOCAB_SIZE = 4096
MAX_POSITIONS = 1024
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, PADDING]
# Words with the space before them, and digits two by two: a number of 2n digits is n tokens, and
# its first token carries the space, so that a value is the same tokens wherever it stands.
WORDS = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sample_texts(seed: int, num_documents: int) -> Iterator[str]:
    """Yield documents of every task; unseen words are in, so that each has its tokens."""
    rng = random.Random(f"tokenizer-{seed}")
    for i in range(num_documents):
        task = TASKS[i % len(TASKS)]
        topic = draw_topic(task, rng, MAX_FACTS, "all")
        segments = plain_document(draw_header(task, rng), topic, [topic.draw_item(rng)], rng)
        yield "".join(segment.text.replace(END_OF_TEXT, "") for segment in segments)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on texts, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder of the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=12_000)
    args = parser.parse_args()
    train_tokenizer(sample_texts(args.seed, args.documents)).save_pretrained(args.out)


if __name__ == "__main__":
    main()
