"""Corpora, tokenizers, and preparing both into token files."""

from moelab.text.corpora import CORPORA
from moelab.text.prepare import PreparedText, Split, prepare
from moelab.text.tokenizer import Tokenizer

__all__ = ["CORPORA", "PreparedText", "Split", "Tokenizer", "prepare"]
