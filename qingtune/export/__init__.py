"""Export: a merged model, GGUF files, a Modelfile and a model card, each checked against the original."""
