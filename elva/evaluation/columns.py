"""The figures that a table of an evaluation shows, and their headings."""

COLUMNS = {
    "t2i_recall_at_1": "t→i R@1",
    "t2i_recall_at_5": "t→i R@5",
    "i2t_recall_at_1": "i→t R@1",
    "i2t_recall_at_5": "i→t R@5",
    "minimal_pair_recall_at_1": "pairs R@1",
}
