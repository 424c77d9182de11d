"""Checksums that others published, and what a file is when its digest is one of them.

Among them are the only published checksums of an applied LLaVA delta: the md5 of the author's merged LLaVA-13B-v0 shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PublishedKind = Literal["base", "llama2", "delta", "merged", "projector", "tokenizer", "sidecar"]
Role = Literal["base", "delta", "merged"]


@dataclass(frozen=True)
class Published:
    """A file whose digest was published: what it is, its kind and source, hex digests ("": none was published), bytes if known."""

    what: str
    kind: PublishedKind
    source: str
    sha256: str = ""
    md5: str = ""
    size: int | None = None


def _rows(prefix: str, kind: PublishedKind, source: str, rows: str) -> tuple[Published, ...]:
    """One record a line: name, md5, sha256, and bytes where they are known; a dash where a digest is not."""
    records = []
    for row in rows.strip().splitlines():
        name, md5, sha256, *size = row.split()
        digests = {"sha256": sha256.strip("-"), "md5": md5.strip("-")}
        records.append(Published(f"{prefix}{name}", kind, source, **digests, size=int(size[0]) if size else None))
    return tuple(records)


META = "shawwn/llama-dl #4 and llama.cpp #238 (md5); llama.cpp SHA256SUMS at 2580d755 and meta-llama/llama PR #87 (sha256)"
META_CALCULATED = "llama.cpp SHA256SUMS at 2580d755 (sha256); md5 calculated from the text that has this sha256"
ALPACA = "Chinese-LLaMA-Alpaca SHA256.md and #120; the Hub's pages of huggyllama/llama-13b and Ejafa/llama_13B"
LLAVA_48 = "posted by LLaVA's author in haotian-liu/LLaVA #48 on 2023-04-25"
LFS = "the Hub's pages of these files"
LFS_COPY = "the Hub's pages of copies; not confirmed for the authors' own file"

PUBLISHED: tuple[Published, ...] = (
    *_rows("LLaMA's and Llama 2's ", "tokenizer", f"{META}; {LLAVA_48}", """
tokenizer.model eeec4125e9c7560836b4873b6f8e3025 9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347 499723
"""),
    *_rows("Meta's LLaMA ", "base", META, """
7B/consolidated.00.pth 6efc8dab194ab59e49cd24be5574d85e 700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d
7B/params.json 7596560e011154b90eb51a1b15739763 7e89e242ddc0dd6f060b43ca219ce8b3e8f08959a72cb3c0855df8bb04d46265
13B/consolidated.00.pth 0804c42ca65584f50234a86d71e6916a 745bf4e29a4dd6f411e72976d92b452da1b49168a4f41c951cfcc8051823cf08
13B/consolidated.01.pth 016017be6040da87604f77703b92f2bc d5ccbcc465c71c0de439a5aeffebe8344c68a519bce70bc7f9f92654ee567085
13B/params.json 0171286599e0f8858893e49fb74b71f8 4ab77bec4d4405ccb66a97b282574c89a94417e3c32e5f68f37e2876fc21322f
30B/consolidated.00.pth f856e9d99c30855d6ead4d00cc3a5573 e23294a58552d8cdec5b7e8abb87993b97ea6eced4178ff2697c02472539d067
30B/consolidated.01.pth d9dbfbea61309dc1e087f5081e98331a 4e077b7136c7ae2302e954860cf64930458d3076fcde9443f4d0e939e95903ff
30B/consolidated.02.pth 2b2bed47912ceb828c0a37aac4b99073 24a87f01028cbd3a12de551dcedb712346c0b5cbdeff1454e0ddf2df9b675378
30B/consolidated.03.pth ea0405cdb5bc638fee12de614f729ebc 1adfcef71420886119544949767f6a56cb6339b4d5fcde755d80fe68b49de93b
30B/params.json 4babdbd05b8923226a9e9622492054b6 2c07118ea98d69dbe7810d88520e30288fa994751b337f8fca02b171955f44cb
65B/consolidated.00.pth 9deae67e2e7b5ccfb2c738f390c00854 135c563f6b3938114458183afb01adc9a63bef3d8ff7cccc3977e5d3664ecafe
65B/consolidated.01.pth 0c4b00c30460c3818bd184ee949079ee 9a600b37b19d38c7e43809485f70d17d1dc12206c07efa83bc72bb498a568bde
65B/consolidated.02.pth 847194df776dd38f8ae9ddcede8829a1 e7babf7c5606f165a3756f527cb0fedc4f83e67ef1290391e52fb1cce5f26770
65B/consolidated.03.pth 3b6c8adcb5654fd36abab3206b46a0f1 73176ffb426b40482f2aa67ae1217ef79fbbd1fff5482bae5060cdc5a24ab70e
65B/consolidated.04.pth 68d61d1242597ad92616ec31b8cb6b4c 882e6431d0b08a8bc66261a0d3607da21cbaeafa96a24e7e59777632dbdac225
65B/consolidated.05.pth 7f71259eaee2b906aa405d8edf39925f a287c0dfe49081626567c7fe87f74cce5831f58e459b427b5e05567641f47b78
65B/consolidated.06.pth 0574e26b6891ab2cb0df7340d773fe9b 72b4eba67a1a3b18cb67a85b70f8f1640caae9b40033ea943fb166bd80a7b36b
65B/consolidated.07.pth e5d9790df955270b836aec79462ead22 d27f5b0677d7ff129ceacd73fd461c4d06910ad7787cf217b249948c3f3bc638
"""),
    *_rows("Meta's LLaMA ", "base", META_CALCULATED, """
65B/params.json 0306cf93a1c2c3891166fe1fd782c2b7 999ed1659b469ccc2a941714c0a9656fa571d17c9f7c8c7589817ca90edef51b
"""),
    *_rows("the first conversion of LLaMA 13B to HF, ", "base", ALPACA, """
pytorch_model-00001-of-00003.bin - dd20cdee2637408c6ab88c13f5c27d153bacd0e99f2d55f6a66fbd0269944436
pytorch_model-00002-of-00003.bin - 1aba886c5f28d2e2e9b04ab3c4f5bc250c6b06efc1baa3f557677b3097f70e6a
pytorch_model-00003-of-00003.bin - 2efc56cddb7877c830bc5b402ee72996aedb5694c9e8007bf1d52d72c0d97d26
"""),
    *_rows("Meta's Llama 2 ", "llama2", "meta-llama/llama #541", """
7b/consolidated.00.pth daa8e3109935070df7fe8fc42d34525e -
13b/consolidated.00.pth 76087fcc6c5269ddea74c4f0f6144e4b -
13b/consolidated.01.pth 3f893d85e21541021aea58a3c4162e4b -
"""),
    *_rows("liuhaotian/", "delta", f"{LFS}, 13b at f50f69d3811e0fba3ad6ef6b911f909925bd9848", """
LLaVA-13b-delta-v0/pytorch_model-00001-of-00003.bin - 2838fe28b196d6c5c9a9d8750d4b04113f04b74f9c75562450fd81da365c87d0
LLaVA-13b-delta-v0/pytorch_model-00002-of-00003.bin - 77f6c67c44a21ad562a2d441ef528269a122598207e1317178bc1f43b4611403
LLaVA-13b-delta-v0/pytorch_model-00003-of-00003.bin - c117714cbcc1e487b8fc15b49cd6cd6da631e0507d5ece91a8ba39b16230f940
LLaVA-Lightning-7B-delta-v1-1/pytorch_model-00002-of-00002.bin - d7c89bb170d36a5b7f0cda596ed863db89326b1dde739c6a2a0ef4dc1f949b87
"""),
    *_rows("SALT-NLP/", "delta", LFS, """
LLaVAR_delta:shard-1 - 411cd93795bb19ba60f4642a97b94a428b1adb30a476cb207569af5909c9bff8
LLaVAR_delta:shard-2 - 90980cde24d2192b432ea1f35670d50cf7e1fa7d1e07ada9419de2a3a0cc71ea
LLaVAR_delta:shard-3 - 3e1238146f3172f3fe4044600fff65af525d09c44b62f0eb73ab2fdf0d9f5355
"""),
    *_rows("the author's merged LLaVA-13B-v0, ", "merged", LLAVA_48, """
pytorch_model-00001-of-00003.bin 9585dc8282cf1ea48c2ae2e07471db0c -
pytorch_model-00002-of-00003.bin 96e55e68ada8315601ee226633074398 -
pytorch_model-00003-of-00003.bin aa21a374a965a0f6118355f901f47b94 -
"""),
    *_rows("the author's merged LLaVA-13B-v0, ", "sidecar", LLAVA_48, """
pytorch_model.bin.index.json 395bf409a41a30abdbf0f8f611eec042 -
config.json 481795ef4fcd5994bc1d4aa200b90abe -
generation_config.json f64a72a6ddd8f35635606b2863fd6931 -
added_tokens.json 95e1b235bf9921a5f1e1f387d87aa46e -
special_tokens_map.json dc67bae5a78e59bafe37782e40763e7f -
tokenizer_config.json a05ef2e4e89a6cc411f6f46b5621ad1a -
"""),
    *_rows("liuhaotian/", "merged", LFS, """
llava-v1.5-13b/pytorch_model-00003-of-00003.bin - 0c5e0caccab8b461962252a0b75c8e80084d5e48f292ab65ff1a78c03a973fcd
llava-v1.6-vicuna-13b/model-00006-of-00006.safetensors - 476286dcb79a9155bcb25c42cb5f763fbf163c8b9f15e83d7c006fbcf9ee800b
llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3:shard-1 - e0248b3525046f858176db972a5207c4e291b4d76495723bc59f99a9758f5ebb
"""),
    *_rows("liuhaotian/", "merged", LFS_COPY, """
llava-v1.5-13b/pytorch_model-00001-of-00003.bin - c64e0b62f8b154e7c8ceb1f95b39ae645d71070b6d00d76bff7b40f083c2d627
llava-v1.5-13b/pytorch_model-00002-of-00003.bin - 13546a4b6616206edf83646d1caaf073a2d008dde4aa4b295a1ef4aef976b086
llava-v1.5-7b/pytorch_model-00002-of-00002.bin - c0eb94eb3fa578a4c63567f2eca6b0acf6a44a891c257aca0df88ffa891de72e
"""),
    *_rows("third-party merge ", "merged", LFS, """
mmaaz60/LLaVA-7B-Lightening-v1-1:shard-2 - 754dbea0bf47c11fa898ee721dcf824e8a4c74211e2d5aa52ac90af8dd52953f
MGIE-LLaVA-7B-v1:shard-2 - 8275a09038dcd08530b505771b25623dbe41db47618a42610026f748abc73d55
"""),
    *_rows("liuhaotian/", "projector", LFS, """
LLaVA-13b-delta-v0/mm_projector.bin - cb222c6c05d9471c6fcfd714ea47e4721780c5c91d649e195b3535edbb8cfbae
llava-v1.5-13b/mm_projector.bin - cef35115bca05e7ab8d4c3ad575b2acfca5999beb2801145f8f518beaa606d3b
pretrained-projector-13b-v0 - 635d4de0afa7425fd0d750a3bd7e843d029bbb6e7bc8e74eeec5cfcf9fedeaeb
pretrained-projector-7b-v0 - 484b9c4d3ab830d73fc5130b5e68b8c305a44e7ef7b99aeb2117b39c9f57739a 16827971
pretrained-projector-13b-no-im-token - f17a3e3f221fbcdbfae19c471c6b9daa0d0e1bf9a9e6ced8468191486b2b66ae 20993435
"""),
    *_rows("liuhaotian/", "projector", LFS_COPY, """
llava-v1.5-7b/mm_projector.bin - be33a3b477e091832a3c8a9fabf5769c43b4cb2c161fc8c464b7bb214f16143a
"""),
)  # fmt: skip

# What must not be given in a role, and why. Tokenizers and small JSON files are left out: several roles share the same ones.
UNFIT: dict[Role, dict[PublishedKind, str]] = {
    "base": {
        "llama2": "the shapes are those of LLaMA 1, so the result would load and talk nonsense",
        "merged": "this is a complete model, to which nothing is to be added",
        "delta": "this is a delta; are `--base` and `--delta` swapped?",
        "projector": "this is only a projector",
    },
    "delta": {
        "base": "this is a base; are `--base` and `--delta` swapped?",
        "llama2": "this is no delta, and LLaVA's deltas do not fit it",
        "merged": "this is a complete model, which needs no base",
    },
    "merged": {
        "base": "this is the base alone, nothing was added to it",
        "llama2": "this is Llama 2 alone, nothing was added to it",
        "delta": "this delta was not applied",
    },
}


def recognise(*, sha256: str | None = None, md5: str | None = None) -> Published | None:
    """The published file with these digests. Where both digests are known on both sides, both must agree: an md5 alone can be forged."""
    for published in PUBLISHED:
        pairs = ((published.sha256, sha256), (published.md5, md5))
        compared = [known == given.lower() for known, given in pairs if known and given]
        if compared and all(compared):
            return published
    return None
