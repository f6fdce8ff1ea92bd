"""Tables, charts, the page, the model card and the documents, made from records alone: no model is loaded here."""
