"""Many answers at the same time, token by token: a cache of fixed size in slots, and a decoding step for all of them.

transformers 5 has two parts of this. Its StaticCache counts one length for all rows, so a row cannot begin while
others are in the middle of their answers. Its continuous batching has slots, but takes token ids only: no images, and
no inputs_embeds, which is all that the language model of MiniCPM-Llama3-V-2.5 gets.
"""
