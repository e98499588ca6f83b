"""Instructions of the embedded corpus, by (query modality, candidate modality).

Four phrasings each, as M-BEIR has them; the first is the default. They are short, because a
small model pays for every token of every row. M-BEIR's own come with it, in
`instructions/query_instructions.tsv`, which the corpus writes too.
"""

EMOJI_DATASET = 10  # M-BEIR's datasets are 0 to 9.

EMOJI_PROMPTS = {
    ("text", "image"): ("Find the picture.", "Show this.", "Draw this.", "Which picture is it?"),
    ("image", "text"): ("Name the picture.", "What is this?", "Describe this.", "Find its name."),
    ("image,text", "image"): (
        "Change the picture.",
        "Alter this.",
        "Edit this.",
        "Find the variant.",
    ),
    ("text", "text"): (
        "Find the name.",
        "Say it in English.",
        "Same meaning.",
        "Find the synonym.",
    ),
    ("image", "image"): ("Find the same thing.", "Match this.", "Same thing.", "Another style."),
}
