"""The store of tastes: liked and disliked pictures as folders, with a journal that forgets nothing.

    input/prefgen/<name>/liked/, disliked/     the pictures: what lies there counts, whoever put it there
    input/prefgen/<name>/taste.jsonl           the journal: what happened when, appended line by line
    input/prefgen/<name>/.trash/               what was removed, so that undo and old revisions find it
    input/prefgen/<name>/.revisions/           which pictures a revision name@1a2b3c4d consists of
    input/prefgen/<name>/.thumbs/              small pictures for the browser

names.py      what a taste may be called, on any system
journal.py    the append-only file: whole lines, many writers, what a killed one leaves
taste.py      one taste: rate, remove, undo, redo, revisions
shelf.py      all tastes below a folder: list, new, copy, rename, forget
origin.py     what a picture says of itself: prompt, seed, model, stars
bare.py       a picture's file without EXIF, GPS and prompts, its pixels untouched
exchange.py   export and import as zip and from folders

No ComfyUI in it. Source of truth is always the folder: a file without an event counts by its time of change.
"""
