"""SASRec (Kang and McAuley, 2018): the model, its training, and its scores as confidences for stage 3."""
