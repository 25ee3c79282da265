"""Published weights in and out: folders of config.json and safetensors, as the Hugging Face hub has them.

A family is one row of `families.FAMILIES`: config.json to our keys and back, and a name map. `names` lays the map over
a model, `folder` opens and checks what is on disk, `load` and `save` move the numbers.
"""
