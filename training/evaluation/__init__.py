"""What is measured of a trained adapter, and how it is told. Nothing here is imported by data/ or common/.

evaluate/           methods, controls and ablations side by side in the atelier, where taste is known
compare/            the same methods on a real base, by stock diffusers and published judges
study/              people as judges: a blinded page, and what their answers say
vqa_score.py        what the MLLM answers to closed questions about users that training left out
ablations.py        trains the adapters with one thing changed that evaluate/ compares
atelier_report.py   the figures of a finished pipeline beside the bars that it should reach
rows.py             the ways of painting that evaluate/ and compare/ have in common
scores.py           PickScore, CSD, the ViPer proxy, CLIP-T and CLIP-I
metrics.py          distances, means and intervals
probes.py           what a vector knows of a user; probe_page.py: its tables and its figure
store.py            results that are computed once
tables.py           Markdown tables with intervals
"""
