"""Preference data: the sets on disk, and how the stages see users, histories and pictures.

schema.py, store.py         the one schema of every set, and how a set is written
agents/, pickapic/          what makes sets: simulated users, Pick-a-Pic
ratings/                    and people's own ratings
vqa/                        questions about a set's users
check.py, card.py           whether a set is whole, and what is in it
worlds.py                   users with their histories and targets: the atelier's, or a set's
atelier_users.py            histories of simulated users, sampled from the pool of picture_pool.py
readers.py                  the MLLM over a world's pictures, in conversations
preference_questions.py     the questions of those conversations, and their answers
image_encoders.py           the image encoder of e_img over a world's pictures
image_tokens.py             the atelier's image tokens, read once
traits.py                   what an MLLM says of every user, for sets without attributes
targets.py                  the words that e_sem is aligned with
branch_data.py              what the branch learns from, batch by batch
picture_shapes.py           the shapes of pictures that aren't square
branch_caches.py            latents and text states, computed once for the branch
"""
