"""PrefGen's training (arXiv 2512.06020): one script a stage, each run as `python -m training.<stage>`, in this order.

train_mllm            histories with questions -> an MLLM that reads histories
extract               histories -> H [n, layers, D] and e_img [n, I]
probe_layers          H -> which layers are e_sem and e_core
train_alignment       e_sem [4, D] -> CLIP's text space [C]
train_user_attention  user vectors [C + D + I] -> user tokens, and the branch beside a frozen UNet
export                the last checkpoint -> the one file that artists load

Below them: common/ (what stages share), data/ (whose taste is learnt), evaluation/ (what is measured), atelier/ (the
stages that make the embedded world and its base models), configs/, and runs/, which starts all of them in order.
"""
